"""What `tests/run` and CI leave to `tests/run thorough`, and why.

CI holds each behaviour once, where that costs least.

Left out is

- what a contract over the `local` runtime holds in each run, where neither Incus nor a relay changes it;
- the same property a second time through the whole stack, or in another variant;
- more of the same: crowds, and the large version of a race or a kill that CI has in small;
- what others' programs do: frameworks' starters, options of the agents' CLIs; and pictures for the docs.

Never left out are attacks, quotas, one kill of each process, a fault of each phase, races with one winner,
and one way through each view of the editor. `tests/unit/test_thorough.py` holds that what is named is there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Final

ALL: Final = os.environ.get("GATEWAY_TEST_THOROUGH") == "1"
"""Whether `tests/run thorough` runs: some tests go through fewer cases without it."""


def examples(number: int) -> int:
    """Return how many of so many examples Hypothesis tries now."""
    return number if ALL else max(number // 4, 5)


def _of(name: str, tests: Iterable[str]) -> list[str]:
    return [f"{name}::{test}" for test in tests]


_CONTRACT_OF_INCUS: Final = (
    *_of(
        "TestIncus",
        (
            "test_a_token_may_come_by_header_or_cookie",
            "test_a_bad_token_closes_with_4401",
            "test_no_token_at_all_is_unauthorized",
            "test_a_foreign_origin_gets_403",
            "test_the_own_origin_is_served",
            "test_a_second_initialize_is_refused_and_the_first_stays",
            "test_without_initialize_the_socket_closes",
            "test_anything_before_initialize_is_a_protocol_error",
            "test_malformed_messages_are_answered_and_survived",
            "test_a_frame_for_an_unknown_channel_closes_with_4400",
            "test_a_frame_over_the_limit_closes_with_1009",
            "test_a_scope_is_needed",
            "test_a_request_id_in_flight_cannot_be_used_again",
            "test_an_unknown_tool_is_an_error_of_the_call",
            "test_a_call_that_nobody_asks_for_again_ends",
            "test_read_before_write_holds_in_a_named_session",
            "test_characters_are_never_split_for_who_asks_for_text",
            "test_a_linger_is_a_number",
            "test_a_tenant_takes_its_share_of_subscriptions",
            "test_a_tenant_takes_its_share_of_tool_sessions",
            "test_too_many_commands_are_refused",
            "test_an_unknown_exec_is_not_found",
            "test_health_needs_no_token",
            "test_problems_have_their_form_and_code",
            "test_no_token_gets_401",
            "test_a_body_over_the_limit_gets_413",
            "test_a_request_id_is_echoed_or_made",
            "test_a_session_cookie_opens_and_closes",
            "test_output_over_the_limit_is_cut_and_said_so",
            "test_what_fell_out_of_the_tail_is_counted",
            "test_a_slow_reader_slows_its_command_and_loses_nothing",
            "test_what_is_left_can_be_set_to_end_with_its_command",
            "test_nothing_is_left_of_a_killed_client_that_asks_for_a_short_linger",
            "test_events_are_cloudevents_with_growing_ids",
        ),
    ),
    *_of("TestIncusInput", ("test_input_that_waited_on_disk_arrives_whole",)),
    *_of(
        "TestIncusPace",
        (
            "test_a_second_viewer_goes_on_beside_one_that_stands_still",
            "test_a_window_lets_one_command_of_a_socket_stand_still_alone",
            "test_the_end_of_a_cancelled_command_waits_for_no_reader",
            "test_a_held_command_goes_on_for_who_takes_the_place",
        ),
    ),
    *_of(
        "TestIncusMcp",
        (
            "test_the_tools_are_the_websockets",
            "test_a_session_is_named_or_stands_alone",
            "test_a_handshake_session_ends_with_its_client",
            "test_a_call_that_is_given_up_leaves_nothing[2025-11-25]",
            "test_nobody_elses_call_is_cancelled",
            "test_progress_grows_while_a_command_runs",
            "test_what_is_refused_is_told_to_the_model",
            "test_a_repeated_call_of_claudes_is_made_once",
            "test_who_may_ask",
            "test_a_body_over_the_limit_is_refused_unread",
        ),
    ),
    *_of(
        "TestIncusLife",
        (
            "test_snapshots_are_told",
            "test_a_stop_right_before_the_end_is_told",
            "test_changes_of_one_tenant_wait_for_one_another",
            "test_who_has_a_name_hears_nothing_of_who_had_it",
            "test_a_clone_that_fails_destroys_nobody_else",
            "test_who_may",
        ),
    ),
    *_of(
        "TestIncusTokens",
        (
            "test_who_reads_nothing_keeps_no_socket_beyond_the_end",
            "test_an_upload_is_not_finished_by_a_token_that_ended",
            "test_a_request_that_is_long_in_coming_is_not_carried_out_after_the_end",
            "test_what_is_under_way_is_carried_out",
            "test_a_renewed_socket_outlives_its_token",
            "test_a_renewed_socket_goes_by_the_new_token_alone",
            "test_a_token_that_may_not_leaves_the_socket_as_it_is",
            "test_what_came_late_for_its_scope_ends_too",
            "test_sessions_in_slots_live_side_by_side",
            "test_a_person_gets_a_token_for_an_agent_that_ends_with_their_own",
            "test_slots_do_not_pile_up_in_a_browser",
            "test_by_https_only_a_cookie_of_this_host_is_taken",
            "test_two_cookies_of_one_name_are_refused_with_what_to_do",
            "test_a_host_that_is_not_ours_is_refused",
            "test_a_host_that_is_ours_is_served",
            "test_a_foreign_page_gets_nothing_by_mcp",
        ),
    ),
    *_of(
        "TestIncusReceipts",
        (
            "test_a_call_is_made_once_whatever_dies",
            "test_a_call_that_a_kill_cut_off_is_not_made_again",
            "test_a_cancel_that_comes_first_holds",
            "test_a_key_makes_an_http_call_once",
        ),
    ),
    *_of(
        "TestIncusFiles",
        (
            "test_a_stale_etag_is_a_conflict",
            "test_scopes_hold",
            "test_a_write_is_told_as_the_tools_tell_theirs",
            "test_too_large_is_told_with_the_limit",
            "test_any_name_is_named",
            "test_ranges",
            "test_conditions",
            "test_refusals_are_problems",
            "test_an_upload_over_the_limit_gets_413",
            "test_an_upload_overtaken_by_another_write_is_stale",
            "test_a_download_is_of_one_state",
            "test_a_file_that_shrinks_breaks_its_download_off",
            "test_many_transfers_are_limited_and_end_with_their_client",
            "test_sigterm_ends_transfers_and_leaves_nothing_unfinished",
            "test_a_large_file_passes_through_without_being_held",
            "test_a_tools_write_is_seen_within_100_ms",
            "test_a_storm_is_an_overflow_and_the_gateway_lives",
            "test_limits_are_told",
            "test_a_watch_ends_with_its_socket",
            "test_paths_and_ignored_names_are_the_clients_choice",
        ),
    ),
)
_HISTORY_OF_INCUS: Final = (
    "test_what_several_change_in_one_file_during_a_turn_is_told_apart",
    "test_what_prints_all_the_time_has_nobody_s_work",
    "test_a_command_s_changes_are_its_session_s",
    "test_a_turn_ends_by_itself_once_its_session_rests",
    "test_what_was_changed_without_a_turn_is_kept_when_one_is_undone",
    "test_what_a_person_saved_before_a_turn_is_there_when_it_is_undone",
    "test_what_a_person_saved_a_moment_before_an_agent_writes_is_on_record",
    "test_a_broken_history_begins_again",
    "test_bad_asks_are_refused_with_words",
    "test_http_has_the_same",
    "test_what_was_asked_for_is_carried_out_though_its_client_is_gone",
    "test_mcp_has_turns_as_resources",
)
_SHELLS_OF_INCUS: Final = (
    "test_sessions_do_not_see_each_others_shells",
    "test_a_hostile_filter_holds_up_nobody",
    "test_only_so_many_run_in_the_background",
    "test_ended_shells_are_forgotten_in_their_order",
    "test_a_background_command_has_an_end",
    "test_they_need_the_scope_exec",
    "test_what_cannot_be_run_is_told_to_the_model",
    "test_a_lone_call_has_no_background",
    "test_an_unused_session_ends_with_what_it_runs",
    "test_bash_output_returns_each_part_once",
    "test_a_workspace_in_which_nothing_can_be_saved_harms_no_command",
    "test_a_named_session_lives_while_a_socket_is_open_on_it",
    "test_output_files_have_a_limit_each_and_together",
    "test_the_same_call_id_runs_once",
)
_CONTRACT_OF_A_RELAY: Final = (
    *_of(
        "TestRelayed",
        (
            "test_what_cannot_start_is_an_error",
            "test_a_programs_own_126_and_127_are_exits",
            "test_a_signal_reaches_the_command",
            "test_a_cancel_behind_the_commands_own_end_does_not_claim_it",
            "test_a_tree_that_just_grows_is_asked_to_end_as_a_whole",
            "test_a_second_cancel_may_have_less_patience",
            "test_what_was_cancelled_counts_no_longer",
            "test_cancel_twice_at_once_answers_both",
            "test_a_cancelled_start_leaves_nothing_running",
            "test_a_timeout_ends_the_tree_and_says_so",
            "test_what_holds_the_output_open_holds_nobody_up",
            "test_what_is_left_can_be_set_to_end_with_its_command",
            "test_characters_are_never_split_for_who_asks_for_text",
            "test_what_fell_out_of_the_tail_is_counted",
            "test_a_linger_is_a_number",
            "test_a_tenant_takes_its_share_of_subscriptions",
            "test_a_tenant_takes_its_share_of_tool_sessions",
            "test_read_before_write_holds_in_a_named_session",
            "test_a_call_that_nobody_asks_for_again_ends",
            "test_a_slow_reader_slows_its_command_and_loses_nothing",
            "test_a_command_outlives_its_socket_and_ends_with_its_linger",
            "test_too_many_commands_are_refused",
        ),
    ),
    *_of(
        "TestRelayedInput",
        (
            "test_input_that_waited_on_disk_arrives_whole",
            "test_a_window_is_told_and_opens_as_the_command_reads",
            "test_ctrl_c_passes_a_terminal_that_is_full",
            "test_a_full_terminal_delays_no_end",
            "test_two_writers_on_one_terminal_are_both_heard",
        ),
    ),
    *_of(
        "TestRelayedPace",
        (
            "test_a_second_viewer_goes_on_beside_one_that_stands_still",
            "test_a_window_lets_one_command_of_a_socket_stand_still_alone",
            "test_the_end_of_a_cancelled_command_waits_for_no_reader",
            "test_a_held_command_goes_on_for_who_takes_the_place",
        ),
    ),
    *_of(
        "TestRelayedMcp",
        (
            "test_the_tools_are_the_websockets[2025-11-25]",
            "test_a_session_is_named_or_stands_alone[2025-11-25]",
            "test_progress_grows_while_a_command_runs[2025-11-25]",
            "test_what_is_refused_is_told_to_the_model",
            "test_a_repeated_call_of_claudes_is_made_once",
        ),
    ),
    *_of(
        "TestRelayedTokens",
        (
            "test_who_reads_nothing_keeps_no_socket_beyond_the_end",
            "test_what_is_under_way_is_carried_out",
            "test_slots_do_not_pile_up_in_a_browser",
        ),
    ),
    *_of(
        "TestRelayedReceipts",
        (
            "test_a_call_is_made_once_whatever_dies",
            "test_a_call_that_a_kill_cut_off_is_not_made_again",
            "test_a_cancel_that_comes_first_holds",
            "test_a_key_makes_an_http_call_once",
            "test_two_that_ask_at_once_get_one_call",
        ),
    ),
    *_of(
        "TestRelayedFiles",
        (
            "test_folders_and_moves",
            "test_hostile_trees_are_listed_and_removed",
            "test_any_name_is_named",
            "test_ranges",
            "test_conditions",
            "test_limits_are_told",
            "test_a_download_is_of_one_state",
            "test_a_file_that_shrinks_breaks_its_download_off",
            "test_sigterm_ends_transfers_and_leaves_nothing_unfinished",
            "test_too_large_is_told_with_the_limit",
            "test_paths_and_ignored_names_are_the_clients_choice",
            "test_changes_of_the_tenants_own_are_seen_at_any_depth",
            "test_a_storm_is_an_overflow_and_the_gateway_lives",
        ),
    ),
)

_INTEGRATION: Final = "tests/integration/test_"
_E2E: Final = "tests/e2e/test_"

LEFT: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "over the `local` runtime tests/unit/test_gateway_local.py and test_tokens_local.py hold it": {
        f"{_INTEGRATION}gateway_incus.py": _CONTRACT_OF_INCUS,
        "tests/unit/test_gateway_relayed.py": _CONTRACT_OF_A_RELAY,
    },
    "over the `local` runtime tests/unit/test_history_local.py holds it": {
        f"{_INTEGRATION}history.py": tuple(_of("TestIncusHistory", _HISTORY_OF_INCUS)),
    },
    "over the `local` runtime tests/unit/test_shells_local.py holds it": {
        f"{_INTEGRATION}shells_incus.py": ("test_case", *_of("TestIncus", _SHELLS_OF_INCUS)),
    },
    "over the `local` runtime tests/unit/test_idle_local.py holds it": {
        f"{_INTEGRATION}idle.py": ("test_who_was_stopped_by_somebody_is_not_woken",),
    },
    "both runtimes decide alike, and in each run one of them does": {
        f"{_INTEGRATION}domains.py": (
            "test_a_domain_is_served_when_its_patch_answers_and_the_old_one_no_more[local]",
            "test_a_sleeping_tenants_new_domain_wakes_it[local]",
            "test_whose_domains[incus]",
            "test_whatever_happens_at_once_a_domain_has_one_owner[incus]",
            "test_the_gateways_own_names_are_nobodys_even_after_a_sleep_and_a_wake[incus]",
            "test_a_patch_into_anothers_first_deployment_takes_nothing[incus]",
        ),
        f"{_INTEGRATION}rollback.py": ("TestLocal",),
        f"{_INTEGRATION}deployments_verify.py": ("test_a_site_of_the_local_runtime_is_told_the_same",),
        f"{_INTEGRATION}tutorial.py": ("test_the_first_hour_is_so_in_containers",),
    },
    "more of what tests/integration/test_deployments_pool.py and test_network.py hold": {
        f"{_INTEGRATION}crowd.py": ("test_a_crowd_is_deployed_four_at_a_time",),
    },
    "a crowd of what tests/integration/test_survive.py holds of a few in each run": {
        f"{_INTEGRATION}survive.py": ("test_two_hundred_commands_are_adopted_at_once",),
    },
    "test_the_oldest_kept_site_goes_where_the_disk_is_full holds it for a deployment": {
        f"{_INTEGRATION}rollback.py": (
            "TestIncus::test_the_oldest_kept_site_goes_where_an_agent_finds_the_disk_full",
        ),
    },
    "`polls` and `kills_its_shell` of tests/integration/actors.py do so over some kills in each run": {
        f"{_INTEGRATION}survive_tools.py": ("test_background_shells_go_on_where_they_stood",),
    },
    "one kill of incusd and of the gateway is in tests/integration/test_gateway_incus.py; here are more": {
        f"{_INTEGRATION}exec_faults.py": (
            "test_a_killed_incusd_with_fifty_commands",
            "test_a_killed_gateway_with_ten_commands",
        ),
        f"{_INTEGRATION}runtime_incus.py": ("test_a_dead_incusd_is_told_and_its_return_found",),
        f"{_INTEGRATION}gateway_incus.py": ("test_a_destroy_whose_end_is_not_known_is_in_the_audit",),
    },
    "TestIncusLife::test_what_others_do_is_seen_within_a_second of tests/integration/test_gateway_incus.py "
    "holds it": {
        f"{_INTEGRATION}gateway_incus.py": ("test_what_others_do_is_told",),
        f"{_INTEGRATION}runtime_incus.py": ("test_watching_tells_what_others_do",),
    },
    "a client's part is in tests/integration/test_client_reconnect.py and clients/typescript/tests, an "
    "upgrade's in test_websockets_are_told_and_resume_with_exact_bytes": {
        f"{_INTEGRATION}upgrade.py": (
            "test_the_python_client_resumes_soon",
            "test_the_typescript_client_resumes_soon",
        ),
    },
    "a variant of test_a_session_that_ends_while_somebody_types_loses_no_letter; when a token is renewed is "
    "held by clients/typescript/tests": {
        f"{_E2E}sessions.py": (
            "test_a_new_token_before_the_end_has_everything_go_on_without_a_break",
            "test_another_tab_that_signs_in_anew_is_enough_for_all_of_the_session",
            "test_who_has_a_wrong_clock_is_asked_by_that_of_the_gateway",
        ),
    },
    "each thing that happens in such a day has a test of its own in tests/e2e": {
        f"{_E2E}working_day.py": ("test_a_day_of_work_loses_no_word",),
    },
    "the stricter one of the two is in each run": {
        f"{_INTEGRATION}systemd.py": ("test_a_restart_leaves_commands_and_a_stop_ends_them[root]",),
    },
    "a clone is woken as test_a_sleeping_site_is_woken_by_its_first_visitors holds for any site": {
        f"{_INTEGRATION}idle.py": (
            "test_a_renamed_clone_that_sleeps_is_woken_by_its_visitors",
            "test_a_clone_that_sleeps_since_an_earlier_version_is_woken",
        ),
    },
    "a variant of test_a_domain_is_served_when_its_patch_answers_and_the_old_one_no_more": {
        f"{_INTEGRATION}domains.py": ("test_a_clone_is_led_to_when_its_patch_answers",),
    },
    "how long is what tests/unit/test_rootfs_workers.py holds": {
        f"{_INTEGRATION}files.py": ("test_idle_workers_end",),
    },
    "what is chosen is held by tests/unit/test_deployments_detection.py, that it is served by the others "
    "of the file; frameworks are tried by tests/run starters": {
        f"{_INTEGRATION}deployments_detection.py": (
            "test_starters_of_others_are_sites_as_they_are",
            "test_a_vite_app_is_served_by_its_dev_server",
            "test_a_python_app_outlives_its_update",
        ),
        f"{_E2E}hot_reload.py": ("test_a_starter_shows_an_edit_on_a_real_domain",),
    },
    "an option or a habit of an agent's CLI; what our part does is in tests/unit/test_client_claude.py": {
        f"{_INTEGRATION}claude.py": (
            "test_the_tools_are_there_at_once_beside_the_clis_own_and_a_server_with_many",
            "test_an_interrupt_before_the_first_message_leaves_the_session_usable",
            "test_a_call_that_takes_too_long_is_given_up_with_its_tree",
            "test_results_are_cut_by_us_within_the_clis_limits",
            "test_two_megabytes_are_written_and_an_image_is_seen",
            "test_a_tenant_that_is_away_is_told_to_the_model",
            "test_twelve_reads_of_one_turn_run_at_once",
            "test_a_callback_that_fails_harms_no_command",
            "test_hooks_run_where_it_is_not_bare",
            "test_claude_code_works_in_a_tenant_over_mcp[legacy]",
            "test_claude_code_has_a_session_of_its_own_only_in_the_handshake_protocol[legacy]",
            "test_claude_code_that_is_ended_takes_its_command_along[legacy]",
            "test_progress_keeps_a_long_call_of_claude_code_alive",
        ),
        f"{_INTEGRATION}claude_newest.py": ("test_agents_work_with_the_newest_sdks",),
        f"{_INTEGRATION}claude_permissions.py": (
            "test_who_decides[nobody is asked where nobody is named-python]",
            "test_who_decides[nobody is asked where nobody is named-typescript]",
            "test_who_decides[what a person allows runs-python]",
            "test_who_decides[what a person allows runs-typescript]",
            "test_who_decides[what a person allows for ever is not asked again-typescript]",
            "test_who_decides[a part that is allowed runs, and no other-typescript]",
            "test_who_decides[in dontAsk what is not allowed is denied-typescript]",
            "test_who_decides[without anybody to ask the default mode denies-python]",
            "test_who_decides[without anybody to ask the default mode denies-typescript]",
            "test_who_decides[acceptEdits accepts edits alone-typescript]",
        ),
        f"{_INTEGRATION}claude_typescript.py": (
            "test_an_agent_works_in_the_tenant_and_reaches_nothing_else[bun-False]",
            "test_a_session_is_resumed_in_another_process",
        ),
    },
    "one of fifty sizes would show it; that output is taken in for a viewer that stands still is held by "
    "tests/unit/test_execs.py": {
        f"{_INTEGRATION}silent_viewers.py": ("test_a_viewer_that_stands_still_loses_nothing",),
    },
    "that the docs' words run; what they call is held by tests/integration/test_claude.py and others": {
        f"{_INTEGRATION}docs_clients.py": (
            "test_without_asyncio",
            "test_who_decides_what_an_agent_may_do",
            "test_an_agent_to_copy",
            "test_a_site_is_published_followed_and_put_to_sleep",
            "test_a_turn_that_is_shown_and_taken_back",
            "test_a_token_that_is_read_when_it_is_needed",
            "test_the_agent_sdk",
            "test_the_messages_api",
        ),
    },
    "what a method imports is held by tests/unit/test_client_package.py": {
        f"{_INTEGRATION}client_extras.py": ("test_every_method_has_what_it_needs",),
    },
    "what others' generators make of the document; tests/unit/test_openapi.py holds what they stumble over": {
        f"{_INTEGRATION}openapi_clients.py": ("test_generated_clients_upload_a_file",),
    },
    "a setting of the text, or what clients/web/tests hold of language servers; what one sees of them is "
    "shown by the other tests of the file": {
        f"{_E2E}language_servers.py": (
            "test_a_file_is_formatted_as_it_is_saved_if_one_likes_that",
            "test_the_text_has_the_keys_of_vim_if_one_likes_them",
            "test_a_server_that_is_killed_comes_back",
            "test_a_server_that_nobody_uses_for_five_minutes_ends_and_the_next_key_starts_it",
        ),
    },
    "how texts come together is held by clients/web/tests, and that they do by "
    "test_two_people_and_an_agent_in_one_file_see_one_anothers_changes": {
        f"{_E2E}trust.py": ("test_two_tabs_edit_one_file_and_neither_loses_a_word",),
    },
    "of the two outputs the other one becomes larger": {
        f"{_INTEGRATION}stalls.py": ("test_a_waited_for_output_that_is_no_text[no text]",),
    },
    "a variant of test_a_network_that_fails_for_a_moment_is_not_noticed": {
        f"{_E2E}network.py": (
            "test_an_editor_whose_files_do_not_come_says_so_and_loads_them_when_asked",
            "test_a_part_of_the_editor_that_does_not_load_is_told_and_comes_with_the_page",
        ),
    },
    "what is in the wheel is held by test_it_holds_everything_of_ours_that_is_read_at_run_time": {
        f"{_E2E}wheel.py": ("test_alone_it_serves_the_editor_and_has_its_templates",),
    },
    "a variant of test_who_comes_right_after_a_site_froze_gets_the_page_in_time": {
        f"{_INTEGRATION}hangs.py": ("test_a_tenant_that_is_paused_is_answered_for",),
    },
    "more locks of programs that cannot run twice; a process id's and a port's are held by the other "
    "parameters": {
        f"{_INTEGRATION}deployments_exchange.py": (
            "test_a_program_that_cannot_run_twice_is_updated[others]",
            "test_so_are_its_environment_and_a_rollback_and_a_broken_one_is_undone[kill]",
        ),
    },
    "a picture for the docs; that axe finds nothing in any view is held by the other tests of the file": {
        f"{_E2E}pictures.py": (
            "test_the_editor_with_files_terminal_and_preview",
            "test_a_conflict",
            "test_views_at_the_side",
            "test_at_1024_pixels",
            "test_what_is_asked_of_a_session",
            "test_signing_in",
        ),
        f"{_E2E}agent.py": ("test_an_agent_at_work_in_a_picture",),
    },
}

_NAMES: Final = {(file, name) for files in LEFT.values() for file, names in files.items() for name in names}


def leaves(test: str) -> bool:
    """Return whether a test, `FILE::[CLASS::]NAME[PARAMETERS]`, is left out."""
    file, _, name = test.partition("::")
    bare = name.partition("[")[0]
    return not _NAMES.isdisjoint({(file, name), (file, bare), (file, bare.partition("::")[0])})
