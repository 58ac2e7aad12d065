"""Write a student as GGUF or ONNX, on one int4 grid, and prove that the file is right."""
