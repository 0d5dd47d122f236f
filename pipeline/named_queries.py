"""Ready-made questions to the results tables. A $name in the SQL is a parameter, with its default beside it."""

from __future__ import annotations

from dataclasses import dataclass, field

Value = int | float | str


@dataclass(frozen=True)
class NamedQuery:
    """One question."""

    question: str
    sql: str
    parameters: dict[str, Value] = field(default_factory=dict)
    """Defaults by name; a value given replaces one and is read as what the default is."""


QUERIES = {
    "nightly-summary": NamedQuery(
        "What came of each night, category by category?",
        """
        WITH scored AS (
            SELECT night, category, count(*) AS images, count_if(is_anomalous) AS anomalous,
                   median(score / threshold) AS median_severity, max(model_version) AS model_version
            FROM newest GROUP BY ALL
        ), failed AS (
            SELECT night, category, count(DISTINCT image_id) AS failures
            FROM failures ANTI JOIN newest USING (night, category, image_id) GROUP BY ALL
        )
        SELECT night, category, coalesce(images, 0) AS images, coalesce(anomalous, 0) AS anomalous,
               round(100 * anomalous / images, 1) AS anomalous_percent, coalesce(failures, 0) AS failures,
               round(median_severity, 3) AS median_severity, model_version
        FROM scored FULL JOIN failed USING (night, category) ORDER BY night, category
        """,
    ),
    "worst": NamedQuery(
        "Which photographs are the most anomalous, against the threshold of their category?",
        """
        SELECT night, category, archive, member, round(score / threshold, 3) AS severity, len(regions) AS regions, image_id
        FROM newest WHERE is_anomalous ORDER BY score / threshold DESC, image_id LIMIT $limit
        """,
        {"limit": 20},
    ),
    "defect-sizes": NamedQuery(
        "How large are the anomalous regions of each category, in percent of the photograph?",
        """
        WITH own AS (
            SELECT category, unnest(regions).area * 100.0 / (width * height) AS percent FROM newest WHERE is_anomalous
        )
        SELECT category, count(*) AS regions,
               round(min(percent), 4) AS smallest, round(quantile_cont(percent, 0.25), 4) AS quarter,
               round(median(percent), 4) AS half, round(quantile_cont(percent, 0.75), 4) AS three_quarters,
               round(max(percent), 4) AS largest
        FROM own GROUP BY category ORDER BY category
        """,
    ),
    "failures": NamedQuery(
        "What could not be scored, and why?",
        """
        SELECT night, category, stage, error, count(DISTINCT image_id) AS images, count(DISTINCT archive) AS archives,
               min(archive) AS first_archive, min(member) AS first_member, min(detail) AS detail
        FROM failures ANTI JOIN newest USING (night, category, image_id)
        GROUP BY night, category, stage, error ORDER BY images DESC, night, category, error LIMIT $limit
        """,
        {"limit": 50},
    ),
    "slowest-archives": NamedQuery(
        "Which archives took the scoring actors longest?",
        """
        SELECT night, category, archive, sum(scored + failed) AS images, round(sum(seconds), 1) AS seconds,
               round(sum(scored + failed) / sum(seconds), 2) AS images_per_second, round(sum(bytes) / 1048576, 1) AS mib
        FROM archives WHERE seconds > 0 GROUP BY night, category, archive ORDER BY sum(seconds) DESC, archive LIMIT $limit
        """,
        {"limit": 20},
    ),
    "review-sample": NamedQuery(
        "Which photographs should people look at, to find a better threshold (evaluate --recalibrate)?",
        # At random, but always the same ones, so many above and so many below the threshold of each category and night.
        """
        SELECT image_id, NULL::VARCHAR AS verdict, night, category, is_anomalous, archive, member FROM newest
        QUALIFY row_number() OVER (PARTITION BY night, category, is_anomalous ORDER BY md5(image_id || $seed)) <= $each
        ORDER BY night, category, md5(image_id || $seed)
        """,
        {"each": 150, "seed": "0"},
    ),
    "rates": NamedQuery(
        "How many photographs would be anomalous, had the models been asked for another false-alarm rate?",
        # By rank of the scores that each model's threshold comes from (pipeline/thresholds.py), where these are enough.
        """
        WITH ranked AS (
            SELECT category, model_version, normal_score, count(*) OVER (PARTITION BY category, model_version) AS normal_images,
                   row_number() OVER (PARTITION BY category, model_version ORDER BY normal_score DESC) AS rank
            FROM calibration
        ), bounds AS (
            SELECT category, model_version, rate, normal_images, normal_score AS threshold
            FROM ranked, (SELECT unnest([0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2]) AS rate)
            WHERE rank = floor(rate * (normal_images + 1) + 1e-9)
        )
        SELECT night, category, model_version, rate::DOUBLE AS rate, round(bounds.threshold, 3) AS threshold, count(*) AS images,
               count_if(score > bounds.threshold)::BIGINT AS anomalous,
               round(100 * count_if(score > bounds.threshold) / count(*), 1) AS anomalous_percent, normal_images
        FROM newest JOIN bounds USING (category, model_version) WHERE coalesce(member, '') LIKE $member
        GROUP BY ALL ORDER BY night, category, model_version, rate
        """,
        {"member": "%"},
    ),
    "drift": NamedQuery(
        "Have a night's scores moved away from those of the model's own normal photographs?",
        # Two-sample Kolmogorov-Smirnov; its tail by the series of Kolmogorov with Stephens' correction for small samples
        # (Press et al., Numerical Recipes, 14.3.17-14.3.19). All photographs count: a shift may lift normal ones over
        # the threshold.
        """
        WITH pooled AS (
            SELECT night, category, model_version, score, 1 AS ours FROM newest
            UNION ALL
            SELECT night, category, model_version, normal_score, 0
            FROM calibration JOIN (SELECT DISTINCT night, category, model_version FROM newest) USING (category, model_version)
        ), steps AS (
            SELECT night, category, model_version,
                   abs(sum(ours) OVER below / sum(ours) OVER whole
                       - sum(1 - ours) OVER below / nullif(sum(1 - ours) OVER whole, 0)) AS gap,
                   sum(ours) OVER whole AS images, sum(1 - ours) OVER whole AS normal_images
            FROM pooled
            WINDOW whole AS (PARTITION BY night, category, model_version),
                   below AS (PARTITION BY night, category, model_version ORDER BY score RANGE UNBOUNDED PRECEDING)
        ), largest AS (
            SELECT night, category, model_version, max(gap) AS distance, max(images) AS images,
                   max(normal_images) AS normal_images,
                   sqrt(max(images) * max(normal_images) / (max(images) + max(normal_images))) AS root
            FROM steps WHERE images > 0 GROUP BY ALL
        ), tested AS (
            SELECT *, CASE WHEN normal_images = 0 THEN NULL WHEN distance = 0 THEN 1 ELSE least(1, greatest(0, 2 * list_sum([
                       pow(-1, k - 1) * exp(-2 * pow(k * (root + 0.12 + 0.11 / root) * distance, 2)) for k in range(1, 101)
                   ]))) END AS p
            FROM largest
        )
        SELECT night, category, model_version, images::BIGINT AS images, normal_images::BIGINT AS normal_images,
               round(distance, 3) AS distance, p, CASE
                   WHEN normal_images = 0 THEN 'no calibration'
                   WHEN images < $min_images THEN 'too few images'
                   WHEN distance >= $distance AND p < $significance THEN 'DRIFT'
                   ELSE 'steady' END AS verdict
        FROM tested ORDER BY night, category, model_version
        """,
        {"min_images": 50, "distance": 0.3, "significance": 0.001},
    ),
}
