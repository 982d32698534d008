"""BRAIn: the stage, and where its rounds come from and go."""
