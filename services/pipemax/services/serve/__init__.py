"""`pipemax serve`: a running system behind OpenAI's HTTP interface.

A process of its own and a client like others: it holds no model and no queue, and can be started,
stopped and killed without harm to what the system runs.

| module | what it does |
|---|---|
| `app` | the routes, and what is opened and closed with the server |
| `guard` | what holds for all requests: key, host, limits, errors, metrics |
| `completions`, `chunks` | chats and completions, as a whole and as they come |
| `bridge` | the thread that talks to the system |
| `files`, `upload`, `store` | files: their endpoints, multipart bodies, the folder |
| `batches`, `book`, `worker` | batches: their endpoints, what is kept of them, their progress |
| `openapi`, `openapi_operations`, `openapi_answers` | the description of all that |
"""
