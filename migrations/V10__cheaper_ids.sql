-- The rule for ids, for less work. (`{1,128}` in a regular expression took 10 µs for an id of ten characters,
-- and each change of a task checks three; this takes 0.2.)
create or replace function taskwire_is_id(id text) returns boolean
    language sql immutable parallel safe
    return id !~ '[^A-Za-z0-9._:/@-]' and octet_length(id) between 1 and 128;

create or replace function taskwire_are_ids(ids text[]) returns boolean
    language plpgsql immutable parallel safe as $$
declare
    id text;
begin
    -- `foreach` walks through lists of lists, too, which nobody can read.
    if array_ndims(ids) > 1 or array_lower(ids, 1) <> 1 then
        return false;
    end if;
    foreach id in array ids loop
        if id is null or id ~ '[^A-Za-z0-9._:/@-]' or octet_length(id) not between 1 and 128 then
            return false;
        end if;
    end loop;
    return true;
end
$$;

-- The rule of taskwire_is_id, written out (see V8). Validated by V12.
alter table tasks
    drop constraint tasks_codebase_is_valid,
    drop constraint tasks_target_worker_is_valid,
    drop constraint tasks_agent_type_is_valid,
    add constraint tasks_codebase_is_valid check (
        codebase_id !~ '[^A-Za-z0-9._:/@-]' and octet_length(codebase_id) between 1 and 128) not valid,
    add constraint tasks_target_worker_is_valid check (
        target_worker_id !~ '[^A-Za-z0-9._:/@-]' and octet_length(target_worker_id) between 1 and 128) not valid,
    add constraint tasks_agent_type_is_valid check (
        agent_type !~ '[^A-Za-z0-9._:/@-]' and octet_length(agent_type) between 1 and 128) not valid;
