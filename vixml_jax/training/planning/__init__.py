"""What a run needs, before anything is allocated: its programs are compiled from shapes alone.

The devices need not exist. Memory and least time of the programs are printed.
"""
