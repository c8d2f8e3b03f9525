"""From a front to repositories on the Hub."""
