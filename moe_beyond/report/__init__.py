"""Tables, plots and HTML pages of results; `labels` has the names that all of them show.

.. include:: README.md
"""
