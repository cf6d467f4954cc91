"""Sample footage and its ground truth, for the demo and the tests.

`footage` makes it: the images with `people`, `scenes` and `compositing`, the video with `walkers`. `source_images`
reads the photograph and the textures that everything is drawn from. `ground_truth` says what the footage shows, and
compares that with what was found.
"""
