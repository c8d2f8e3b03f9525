"""Small models, data and a Hub on the loopback: what the tests and the examples run on."""
