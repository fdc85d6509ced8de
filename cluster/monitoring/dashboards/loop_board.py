"""Dashboard of the closed loop."""

from cluster.monitoring.dashboards.graphs import Board, graph, one, value

LOOP = Board(
    uid="orchard-loop",
    title="Orchard / Loop",
    rows=(
        (
            graph(
                "Reward per draw", "none",
                "Predicted before a policy was published, and realized in the window after.",
                (value("orchard_loop_predicted_reward"), "{{run}} predicted"),
                (value("orchard_loop_realized_reward"), "{{run}} realized"),
                (value("orchard_loop_serving_reward"), "{{run}} served policy, off-policy"),
            ),
            graph(
                "Intervals", "none", "95 % intervals of both.",
                (value("orchard_loop_predicted_reward_low"), "{{run}} predicted, low"),
                (value("orchard_loop_predicted_reward_high"), "{{run}} predicted, high"),
                (value("orchard_loop_realized_reward_low"), "{{run}} realized, low"),
                (value("orchard_loop_realized_reward_high"), "{{run}} realized, high"),
            ),
            one("Reward per request", "none", "Over all that was shown in a window.",
                 "orchard_loop_reward"),
        ),
        (
            graph(
                "Decisions", "none", "Policies published, refused by the gate, and rolled back.",
                (value("orchard_loop_published_total"), "{{run}} published"),
                (value("orchard_loop_refused_total"), "{{run}} refused"),
                (value("orchard_loop_rolled_back_total"), "{{run}} rolled back"),
            ),
            graph(
                "Windows", "none", "Without exposures, and with a reward outside the prediction.",
                (value("orchard_loop_skipped_total"), "{{run}} skipped"),
                (value("orchard_loop_outside_total"), "{{run}} outside"),
            ),
            one("Drift", "none", "Change of one policy's reward per draw between two windows.",
                 "orchard_loop_drift"),
        ),
        (
            graph(
                "Size of a window", "none", "Requests and events.",
                (value("orchard_loop_window_requests"), "{{run}} requests"),
                (value("orchard_loop_window_events"), "{{run}} events"),
            ),
            one("Lag of events", "s", "Median time from an exposure to its event.",
                 "orchard_loop_event_delay_seconds"),
            one("Late events", "none", "Events that arrived after their window was closed.",
                 "orchard_loop_late_events_total"),
        ),
    ),
)  # fmt: skip
