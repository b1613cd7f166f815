"""`report.py check`: the challenge's rules for any record folder, whose code is read and never run. See README.md here."""
