"""A study as one HTML page: charts, findings in words, and the page around them."""
