"""`python -m m2mkd_ray` is `m2mkd`."""

from m2mkd_ray.cli import main

if __name__ == "__main__":
    main()
