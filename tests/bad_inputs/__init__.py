"""Tables of bad inputs, and one test that gives all of them to the real command line."""
