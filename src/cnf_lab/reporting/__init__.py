"""What ``python -m cnf_lab.report`` makes of run folders: reading, curves, pictures, tables, one page."""
