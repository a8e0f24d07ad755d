"""The model behind HTTP, in OpenAI's shapes, for trying it out. `create_app` makes the application; it needs the extra
`serve`. Nothing here trains."""
