"""pi0 and pi0.5: the flow-matching policies of Physical Intelligence's openpi."""
