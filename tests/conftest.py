"""One run of the tests is like another: Hypothesis draws the same examples each time, on a busy machine too.

``pytest --hypothesis-profile=explore`` draws new ones, and many more: worth an hour now and then.
"""

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("repeatable")
