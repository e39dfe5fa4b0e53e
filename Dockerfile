# udakit with its examples, on a machine without a GPU:
#   docker build -t udakit . && docker run --rm -v "$PWD/runs:/udakit/runs" udakit
# For CUDA leave out --index-url, or take the index for your driver from https://pytorch.org/get-started/locally/.
FROM python:3.12-slim
WORKDIR /udakit
RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu
COPY . .
RUN pip install --no-cache-dir -e ".[examples]" && python -m udakit
CMD ["python", "examples/train_gta2cs.py"]
