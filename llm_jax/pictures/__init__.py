"""Pictures of models, their data and their weights.

The functions in `attention_maps`, `surprisals` and the other modules return dataclasses of labelled numpy arrays. The
method `picture` of a result arranges them as panels (`panels`). Three renderers draw panels: `render_text` for
terminals, `render_html` for pages and notebooks, `render_png` for files. To add a picture, write such a module; to add
a kind of panel, add a function to each renderer.
"""
