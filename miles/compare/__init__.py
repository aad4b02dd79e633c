"""Runs beside one another: did they see the same data, what differs, how do their losses run?

In: the folders of two or more runs. Out: a `Comparison`, as text or as JSON. It runs in the process
of `miles compare`, reads the small files of the folders, and loads neither torch nor Ray. It may
import `common`, `train`'s settings and what `report` reads of a folder.
"""
