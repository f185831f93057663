"""Lists the packages, so that a new sub-folder can never be missing from a wheel."""

from setuptools import find_namespace_packages, setup

FOLDERS = ('configs', 'data', 'evaluation', 'generators', 'launch', 'networks', 'tokenizers')
found = find_namespace_packages('.', include=[p for f in FOLDERS for p in (f, f'{f}.*')])
setup(package_dir={'smalti': '.'}, packages=['smalti', *(f'smalti.{p}' for p in found)])
