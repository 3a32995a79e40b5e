"""What is said with every prediction."""

NOTICE = "Research software, not a medical device: not to be used to diagnose or to treat anyone."
