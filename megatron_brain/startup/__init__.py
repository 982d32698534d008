"""Makes one resolved run from the settings and from what is on disk, before any process group is made."""
