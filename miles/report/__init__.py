"""The results of a run for a person, also while it runs: report.html, loss.png, the first batch.

In: the files of a run's folder, local or remote. Out: a page that needs no network, a picture, and
text for the terminal. It runs in the user's own process; no Ray, no GPU. It may import everything
below `miles.demo` and `miles.cli`, and imports matplotlib only when it draws.

    run_data      the files of a run's folder -> metrics, ledger, answers, starts, skipped steps
    charts        metrics -> curves
    report        all of it -> report.html (from report.html.jinja) and loss.png
    first_batch   the samples of the first step -> the terminal
"""
