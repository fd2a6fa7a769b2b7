"""The cluster: processes that become ranks, find each other, agree, and tell what befell them.

Collectives and the layout of ranks, hosts and the rendezvous, start-up, log files, signals, and `agreement`: the one
home of "all ranks have the same, or all raise". Imports `zero`. Models, rows and losses do not belong here.
"""
