"""Architecture space: which blocks of which models a merged model runs, in which order (HM3, arXiv 2409.18893)."""
