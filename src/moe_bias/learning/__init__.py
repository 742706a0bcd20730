"""Learning while serving: what users say of answers becomes new versions of an adapter, a few milliseconds each.

Hidden states of an answer are there when it has been served, an update touches neither backbone nor cache, and so an
adapter can learn between two requests. Feedback is a *lesson*: an answer as its user would have it, a better answer,
or a number. It is written to the adapter's *journal* before it is acknowledged, and the adapter is a function of its
journal alone: whatever process is killed, nothing acknowledged is lost or applied twice.

`lessons` are what is learned from and how they are written, `journal` keeps them, `objective` and `update` make one
step of an adapter, `learner` decides what is published, `process` runs learners beside a server, and `service` is what
the server holds.
"""
