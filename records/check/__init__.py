"""`report.py check`: the challenge's rules for any record folder, whose code is read and never run.

rules.py judges what entry.py reads of a folder. source.py unpacks scripts, syntax.py (and downgrade.py) parses them,
patterns.py and flow.py find what was ruled out; leaks.py looks for validation documents in training shards.
"""
