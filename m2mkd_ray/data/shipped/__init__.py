"""The data set that ships with the package, and what makes it."""
