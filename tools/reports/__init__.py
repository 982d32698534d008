"""What `tools/report.py` makes of the runs of an experiment."""
