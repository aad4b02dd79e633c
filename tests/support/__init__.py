"""Builders that tests share; a test imports from here, never from another test.

streams, row_files        the demo's data as a stream, files of rows
models, shapes, ranks     tiny models, trainers, gloo ranks that stay alive between calls
commands, runs, disks     `miles train` in processes that can be killed, what a run leaves behind
scenarios, stand_ins      a process with a Ray of its own; stages that are slow, wait or die
nodes                     Ray clusters of several nodes, and one that takes jobs
processes                 waiting for a condition, finding processes, running a command line
terminal                  a command in a terminal, and what its screen shows
heavy                     which files `make quick` leaves out, and which part a file belongs to
fault_table               the rows of docs/faults.md
"""
