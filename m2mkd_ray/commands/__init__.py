"""The commands of `m2mkd`, a file a topic; `m2mkd_ray.cli` puts them together.

What is heavy (torch, Ray) is imported inside the commands, so that `m2mkd --help`
answers at once.
"""
