"""From the settings and what is on disk to one resolved run, before any process group is made."""
