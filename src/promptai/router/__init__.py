"""Which model, which replica, when, and what happens after a failure.

``selection`` resolves the model. A request then passes through three packages, each importing only those after it:
``failover`` (attempts), ``schedule`` (queue and slots), ``estimate`` (cost on each replica).
"""
