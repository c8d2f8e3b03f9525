def requests(*a): return []
