"""`miles.train.run`: a run from a notebook or a script, and what it leaves to look at.

In: a `TrainConfig`, or Miles's flags as keywords. Out: a `TrainedRun`, and all that `miles train`
writes. It runs in the process of the notebook, and does there what `miles train` does in its own:
both call `driver.command.carry_out`. It may import `launch` and `driver`; none of them imports it.

    training      the function: settings -> a run
    trained_run   its result: the folder, the losses, a line of text and a picture
"""
