# A CPU image by default. docs/guides/docker.md has the build arguments of the CUDA image.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS python
# CUDA bases come without Python.
RUN command -v python3 \
    || { apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*; }
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

FROM python AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM python
# PyTorch's wheels bring their own CUDA libraries, so the base only has to declare the driver.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /requirements
COPY pyproject.toml requirements.txt ./
# What pyproject.toml requires, extras included, in the tested versions; the development tools of requirements.txt are left out.
RUN grep -v '^-e' requirements.txt > pins.txt \
    && python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*project['dependencies'], *sum(project['optional-dependencies'].values(), []), sep='\n')" > runtime.txt \
    && pip install --index-url "$TORCH_INDEX" --constraint pins.txt torch torchvision \
    && pip install --constraint pins.txt --requirement runtime.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels pip install --no-deps /wheels/*.whl

# Any user ID can be given to `docker run --user`: nothing outside of /data is written.
RUN useradd --uid 10001 --no-create-home --home-dir /data nora && install --directory --owner nora /data
ENV HOME=/data HF_HOME=/data/huggingface MPLCONFIGDIR=/tmp/matplotlib
USER nora
WORKDIR /data
VOLUME /data
EXPOSE 7860
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860')"]
ENTRYPOINT ["nora-vision"]
CMD ["app", "--host", "0.0.0.0", "--port", "7860", "--accounts", "/data/accounts.txt", "--runs_dir", "/data/runs", "--uploads_dir", "/data/uploads"]
