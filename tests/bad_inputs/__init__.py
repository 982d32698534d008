"""Bad inputs through the real command line: tables of them, and one test for all."""
