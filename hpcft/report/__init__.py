"""What a run was: its story, where its time went, and the page that shows both.

Pure computation on what the run has left (:mod:`hpcft.report.record` reads it), a module a
question; :mod:`hpcft.report.story` puts the answers together, :mod:`hpcft.report.page` draws them.
"""
