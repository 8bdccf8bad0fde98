"""Models → embeddings of clips, by name of layer: stores of them, HEAR's interface, linear probes.

Uses `student` and `teacher`, loaders and the rooms below; scikit-learn, of the extra `probe`, is imported late.
"""
