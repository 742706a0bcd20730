"""Work on several machines, by Ray: hidden states stay where they were computed.

Workers load the frozen model by its name, once. What goes to them is token ids, and a layer's weights where there is
one; what comes back is checksums, texts, a few bytes a sampled token, or a gradient of the layer's size. Each piece of
work is a function of what it is given alone, so that one whose worker has died is done again by another, to the same
bytes. Ray carries calls as pickles: as with any Ray cluster, whoever can reach it can run code on it.
"""
