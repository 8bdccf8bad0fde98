"""What people hold → shards and a manifest; finished datasets → other datasets.

Imports no model package.
"""
