"""What the HTTP API takes and answers, as dataclasses; how they are read, and the OpenAPI document made of them."""
