"""From raw HAM10000, downloaded or synthetic, to a packed shard set."""
