"""What uvicorn's connections lack: bytes in parts, back-pressure on input, time limits."""
