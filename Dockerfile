# docker build -t kit .
# docker run --rm -v "$PWD/runs:/kit/runs" kit --mode simple --seed 3
# docker run --rm --read-only --network none -v "$PWD/runs:/kit/runs" kit ablations/heads.py --seeds 0-9
FROM --platform=linux/amd64 python:3.11-slim

# The address of a wheel index that holds a CPU-only torch; empty: the default index, whose torch is several GB larger.
ARG TORCH_INDEX_URL=
WORKDIR /kit
COPY requirements.txt .
RUN pip install --no-cache-dir ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$(grep '^torch==' requirements.txt)" \
    && pip install --no-cache-dir -r requirements.txt
COPY . .
RUN mkdir -p runs && chown 1000:1000 runs
USER 1000:1000
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1 MPLCONFIGDIR=/kit/runs/.matplotlib TMPDIR=/kit/runs SDL_VIDEODRIVER=dummy
VOLUME /kit/runs
ENTRYPOINT ["/bin/sh", "-c", "case \"$1\" in ablations/*) exec python \"$@\" ;; *) exec python ppo_mbrl.py \"$@\" ;; esac", "kit"]
