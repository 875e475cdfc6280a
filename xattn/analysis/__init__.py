"""Analysis of maps: correlation, reliability, faithfulness and quality."""
