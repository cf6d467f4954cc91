"""The tests, in folders that mirror the packages.

`unit/` and `integration/` hold the tests of a module in the folder of its room; tests that go end to end
stand directly in `integration/`. `chaos/` kills and cuts off services. What several tests need stands here.
"""

from pathlib import Path

#: The folder of the project.
ROOT = Path(__file__).parents[1]
