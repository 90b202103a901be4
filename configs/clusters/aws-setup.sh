#!/usr/bin/env bash
# Creates, once per AWS account, what cluster.yaml needs: a security group that allows SSH only from
# your address, roles for the head and the workers, and a shared folder (EFS). Needs the AWS command
# line with an administrator's credentials, and a default VPC.
#
#   bash configs/clusters/aws-setup.sh us-west-2 us-west-2a
#   SAVE_TO=BUCKET bash configs/clusters/aws-setup.sh us-west-2 us-west-2a     # for storage_path=s3://BUCKET/runs
#
# It prints the name of the shared folder, which goes into cluster.yaml.
set -euo pipefail

region=${1:?the region, such as us-west-2}
zone=${2:?the availability zone, such as us-west-2a}
ssh_from=${SSH_FROM:-$(curl -fsS https://checkip.amazonaws.com)/32}
export AWS_DEFAULT_REGION=$region AWS_DEFAULT_OUTPUT=text AWS_PAGER=

vpc=$(aws ec2 describe-vpcs --filters Name=is-default,Values=true --query 'Vpcs[0].VpcId')
subnet=$(aws ec2 describe-subnets --query 'Subnets[0].SubnetId' \
    --filters Name=vpc-id,Values="$vpc" Name=availability-zone,Values="$zone" \
    Name=default-for-az,Values=true)

# `ray up` finds the group by its name and leaves a group with rules as it is.
group=$(aws ec2 create-security-group --group-name gptray-cluster --vpc-id "$vpc" \
    --description 'gptray: all among its nodes, SSH from one address' --query GroupId)
aws ec2 authorize-security-group-ingress --group-id "$group" \
    --protocol all --source-group "$group" >/dev/null
aws ec2 authorize-security-group-ingress --group-id "$group" \
    --protocol tcp --port 22 --cidr "$ssh_from" >/dev/null

# An instance gets its role from its profile. make_role NAME POLICY...
trust='{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "sts:AssumeRole",
    "Principal": {"Service": "ec2.amazonaws.com"}}]}'
make_role() {
    local name=$1 policy
    aws iam create-role --role-name "$name" --assume-role-policy-document "$trust" >/dev/null
    for policy in "${@:2}"; do
        aws iam attach-role-policy --role-name "$name" \
            --policy-arn "arn:aws:iam::aws:policy/$policy"
    done
    aws iam create-instance-profile --instance-profile-name "$name" >/dev/null
    aws iam add-role-to-instance-profile --instance-profile-name "$name" --role-name "$name"
}
# Workers read data.source from private buckets. The head starts and stops them, and gives them their
# role.
make_role gptray-worker AmazonS3ReadOnlyAccess
make_role gptray-head AmazonEC2FullAccess AmazonS3ReadOnlyAccess
worker=$(aws iam get-role --role-name gptray-worker --query Role.Arn)
aws iam put-role-policy --role-name gptray-head --policy-name start-workers --policy-document \
    "{\"Version\": \"2012-10-17\", \"Statement\": [{\"Effect\": \"Allow\",
    \"Action\": \"iam:PassRole\", \"Resource\": \"$worker\"}]}"

# Workers and head save runs in the bucket and delete the ones that are no longer kept.
if [ -n "${SAVE_TO:-}" ]; then
    for role in gptray-worker gptray-head; do
        aws iam put-role-policy --role-name "$role" --policy-name save-runs --policy-document \
            "{\"Version\": \"2012-10-17\", \"Statement\": [{\"Effect\": \"Allow\",
            \"Action\": [\"s3:PutObject\", \"s3:DeleteObject\", \"s3:AbortMultipartUpload\"],
            \"Resource\": \"arn:aws:s3:::$SAVE_TO/*\"}]}"
    done
fi

# In the same group as the nodes, which allows their traffic to port 2049.
files=$(aws efs create-file-system --creation-token gptray --encrypted \
    --throughput-mode elastic --tags Key=Name,Value=gptray --query FileSystemId)
until [ "$(aws efs describe-file-systems --file-system-id "$files" \
    --query 'FileSystems[0].LifeCycleState')" = available ]; do
    sleep 5
done
target=$(aws efs create-mount-target --file-system-id "$files" --subnet-id "$subnet" \
    --security-groups "$group" --query MountTargetId)
until [ "$(aws efs describe-mount-targets --mount-target-id "$target" \
    --query 'MountTargets[0].LifeCycleState')" = available ]; do
    sleep 5
done
echo "shared folder: $files.efs.$region.amazonaws.com"
