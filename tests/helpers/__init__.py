"""Code that tests share, such as tiny assets and the runner of distributed cases."""
