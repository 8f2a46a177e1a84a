"""Pictures of models: what they attend to, expect, store and change.

A picture is data first. A function of a module of its subject (`attention_maps`, `surprisals`, ...) returns a typed
result, whose figures are numpy arrays with labels. Its `picture` arranges them as panels (`panels`), and three
renderers draw panels: `render_text` for terminals, `render_html` for pages and notebooks, `render_png` for files. To
add a picture, write such a module; to add a kind of panel, add its function to each renderer.
"""
