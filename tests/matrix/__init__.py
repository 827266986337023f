"""Every dialect with every format that it holds, on every kind of model."""
