"""What tests share: tiny assets and the runner of distributed cases."""
